"""The federation on Flower: identity and start go through Flower's messages, rounds over a stream of Meerkat's own."""
