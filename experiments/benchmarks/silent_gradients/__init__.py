"""Silent gradient faults of the past, and right functions: does anything notice, and falsely?"""
