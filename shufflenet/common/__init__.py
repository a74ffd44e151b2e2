"""What every room uses: messages, options, files. No torch."""
