"""What every other room builds on: errors, types, files."""
