"""Recipe `finetune`: fine-tuning on new classes, and what is left of the old ones."""
