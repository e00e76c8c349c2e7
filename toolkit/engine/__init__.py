"""The only deepspeed.initialize, and one verb, ``train_batch``, for whichever of DeepSpeed's engines it returns."""
