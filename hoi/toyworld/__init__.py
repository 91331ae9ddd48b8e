"""The built-in miniature's world: pictures that the project shades itself, and the words for them."""
