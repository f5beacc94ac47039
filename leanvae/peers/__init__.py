"""Other people's autoencoders beside ours: what they take, how they are made, and how frames go through them."""
