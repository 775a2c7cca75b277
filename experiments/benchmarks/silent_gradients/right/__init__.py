"""Right functions as people call them, which nothing may call wrong or disturb."""
