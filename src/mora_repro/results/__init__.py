"""Run records, and the statistics over them."""
