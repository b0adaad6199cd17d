"""Operations: each file holds a plain reference and the forms that must equal it."""
