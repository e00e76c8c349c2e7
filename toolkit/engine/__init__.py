"""The only deepspeed.initialize, and one verb, ``train_batch``, for whichever of DeepSpeed's engines it returns."""

from toolkit.engine.plain import Batch, Engine, Step, loss_key

__all__ = ["Batch", "Engine", "Step", "loss_key"]
