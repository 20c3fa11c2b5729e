"""Applications of a teacher: sampling images and optimising them."""
