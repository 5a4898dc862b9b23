package api

// Sockets returns the VMs that have a socket in dir, sorted by name, with a client for each.
// Nobody is asked: some may be those that dead processes have left, whose clients fail with
// [ErrNotRunning].
func Sockets(dir string) ([]Entry, error) {
	names, err := names(dir)
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, len(names))
	for i, name := range names {
		entries[i] = Entry{Name: name, Client: Open(socketIn(dir, name))}
	}
	return entries, nil
}
