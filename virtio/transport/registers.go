package transport

// registers is the registers' BAR.
type registers struct{ *Transport }

// Read handles the driver's reads. An access belongs to the structure in which
// it starts; bytes behind the structure read as zero.
func (r registers) Read(off uint64, p []byte) {
	clear(p)
	switch {
	case off < commonAt+commonSize:
		r.readCommon(int(off), p)
	case off == isrAt && len(p) > 0:
		p[0] = byte(r.isr.Swap(0)) // reading acknowledges (4.1.4.5)
	case off >= deviceAt && off < deviceAt+deviceSize:
		r.dev.ReadConfig(uint32(off-deviceAt), p)
	}
}

// Write handles the driver's writes.
func (r registers) Write(off uint64, p []byte) {
	switch {
	case off < commonAt+commonSize:
		r.writeCommon(int(off), p)
	case off >= deviceAt && off < deviceAt+deviceSize:
		r.regs.Lock()
		defer r.regs.Unlock()
		r.dev.WriteConfig(uint32(off-deviceAt), p)
	case off >= notifyAt && off < notifyAt+notifySize:
		if i := (off - notifyAt) / notifyStep; i < uint64(len(r.queues)) {
			r.queues[i].Signal()
		}
	}
}
