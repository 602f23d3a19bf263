"""Recipe `unlearn`: ways to make a trained network forget, against training anew."""
