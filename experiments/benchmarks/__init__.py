"""Measurements that anyone can repeat on any device."""
