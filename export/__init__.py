"""A trained model as a file that other programs read: ONNX, torch.export, safetensors, a hub's."""
