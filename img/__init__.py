"""The pictures of the README and the code that draws them."""
