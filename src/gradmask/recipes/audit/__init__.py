"""Which training samples a network memorises: scores, and how well they find wrong labels."""
