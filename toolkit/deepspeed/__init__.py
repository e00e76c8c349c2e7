"""The node ``deepspeed``, which is DeepSpeed's JSON: its keys, its rules, its completion; foreign files. No torch."""
