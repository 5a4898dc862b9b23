package virtio

// Segments is how many segments the loop's chains have room for.
func (l *Loop) Segments() (n int) {
	for _, t := range l.tasks {
		for i := range t.servers {
			for _, c := range t.servers[i].chains {
				n += cap(c.Readable) + cap(c.Writable)
			}
		}
	}
	return n
}
