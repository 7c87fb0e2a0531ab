"""From caches to new tokens: drawing, jitted decode chunks, and the loop that feeds them."""
