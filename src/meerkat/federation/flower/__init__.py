"""The federation on Flower: identity and start go through Flower's messages, rounds over a stream of Meerkat's own."""

import os

# gRPC writes a line for each malformed call, at whatever rate they come, and reads this when first used.
# Flower sets "error" where nothing is set.
if os.environ.get("GRPC_VERBOSITY", "error") == "error":
    os.environ["GRPC_VERBOSITY"] = "NONE"
