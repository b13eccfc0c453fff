"""How the embedded LVLM was made."""
