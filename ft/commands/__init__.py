"""What the commands of ``ft.cli`` do before and around the rooms below: choose a recipe, a folder, and ranks."""
