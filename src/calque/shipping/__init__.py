"""Files and runtimes. What imports a part of it does not wait for the rest: `saved` needs no onnx."""
