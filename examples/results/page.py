def write(*a):
    print("page")
