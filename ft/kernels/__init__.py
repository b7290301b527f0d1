"""Operations with a plain torch reference, shared cases and, where it pays, a Triton form."""
