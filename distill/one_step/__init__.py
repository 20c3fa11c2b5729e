"""One-step and few-step generators: students of a frozen teacher, and the methods that train them."""
