"""Speed and memory, measured beside the limits they stand against."""
