"""What the measuring recipes compute and draw; one module per recipe of the same name."""
