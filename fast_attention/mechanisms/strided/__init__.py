"""Attention among positions a stride apart."""
