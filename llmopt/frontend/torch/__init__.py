"""PyTorch modules, live, exported, scripted or pickled, become Programs."""
