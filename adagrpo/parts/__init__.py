"""Users' own parts, named by import path and called where they can do no harm."""
