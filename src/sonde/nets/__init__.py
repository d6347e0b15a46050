"""Small networks and the loop that trains them."""
