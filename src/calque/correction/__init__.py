"""What is put right when all layers are quantized."""
