"""What runs inside the sandboxes of `sandbox.py`: the program in one, the tests of it in another.

It imports nothing but the standard library, and nothing of it but what is quick to import.
"""
