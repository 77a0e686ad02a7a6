"""Transactions: changes of seeds that show whole or not at all."""
