"""Local attention: windows of softmax attention."""
