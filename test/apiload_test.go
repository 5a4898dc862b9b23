package test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestAPIUnderLoad has 100 clients ask a VM, all the time, for what it is, its metrics, events
// and migrations, while it is moved again and again: each request gets its answer, as long as
// the process lives. How long the guest stands still, with them and without in turn, is printed.
func TestAPIUnderLoad(t *testing.T) {
	const clients = 100
	h := newHost(t)
	h.start("run", "vm0", "--memory", "64M", "--serial", "null").err.awaitText(t, 0, "vm0 runs")
	down := map[int][]float64{}
	began := time.Now()
	for move := 0; move < count(6, 60) || full() && time.Since(began) < time.Minute; move++ {
		from, to := fmt.Sprintf("vm%d", move), fmt.Sprintf("vm%d", move+1)
		_, addr := h.receive(to, "--serial", "null")
		ctx, stop := context.WithCancel(t.Context())
		var all sync.WaitGroup
		var answered atomic.Int64
		now := move % 2 * clients
		for range now {
			all.Go(func() { askAll(ctx, t, filepath.Join(h.dir, "govmm", from+".sock"), &answered) })
		}
		for answered.Load() < int64(now) && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
		r, exit := h.migrate(from, "--to", addr)
		stop()
		all.Wait()
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("%d clients, move %d: exit %d, %+v", now, move, exit, r)
		}
		down[now] = append(down[now], r.DowntimeMS)
	}
	for _, n := range []int{0, clients} {
		d := slices.Sorted(slices.Values(down[n]))
		t.Logf("%d clients: %d moves, downtime %.2f ms (median), %.2f to %.2f", n, len(d), d[len(d)/2], d[0], d[len(d)-1])
	}
}

// askAll asks one thing after the other, each on a connection of its own, until ctx ends or the
// VM's process has gone. A request that the process has taken is answered.
func askAll(ctx context.Context, t *testing.T, socket string, answered *atomic.Int64) {
	taken := false // the process has the connection
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			taken = false
			c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
			taken = err == nil
			return c, err
		}}}
	for i := 0; ctx.Err() == nil; i++ {
		path := []string{"/v1/info", "/metrics", "/v1/migrations", "/v1/events?follow=false"}[i%4]
		resp, err := client.Get("http://vm" + path)
		if err != nil && !taken {
			return // the VM is not there any more
		}
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				err = fmt.Errorf("%s", resp.Status)
			}
		}
		if err != nil {
			// What waits in the listener's queue when the process ends was not taken by it.
			for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
				if _, err := os.Lstat(socket); err != nil {
					return
				}
			}
			t.Errorf("%s: %v", path, err)
			return
		}
		answered.Add(1)
	}
}
