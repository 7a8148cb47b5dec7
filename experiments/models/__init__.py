"""Language models: the decoder, and the formats that its weights and tokens are read from."""
