"""One module and one function a stage; stages never import each other."""
