"""Replicas on Ray behind one address: placed, watched, started again; and who is asked."""
