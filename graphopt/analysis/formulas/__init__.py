"""What formulas in primitive operators say: masks, rotary embeddings, polynomials."""
