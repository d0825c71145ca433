"""The federation on Flower: identity and start over Flower's messages, rounds over a stream of our own."""
