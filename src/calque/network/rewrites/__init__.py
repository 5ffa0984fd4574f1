"""A traced graph in plainer forms."""
