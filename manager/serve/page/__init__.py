"""The page and its parts, as the browser gets them."""
