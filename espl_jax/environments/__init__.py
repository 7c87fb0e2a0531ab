"""Tasks: what the user turn says, and what a reply is worth."""
