"""Networks with known truth: recipes, cards, and the weights of those that are small."""
