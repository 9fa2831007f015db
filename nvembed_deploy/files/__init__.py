"""Files: whole or absent, hashed, read strictly."""
