"""What an optimizer step costs, against plain policy gradient; not part of the package."""
