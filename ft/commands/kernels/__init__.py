"""What `ft bench kernels` times: for each op a short list of cases of realistic size, and who else can do them."""
