"""Adapter folders as PEFT writes them."""
