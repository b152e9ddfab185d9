"""What runs an artifact on this machine: one module for each library that can."""
